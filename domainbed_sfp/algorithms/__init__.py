"""One file per method. Importing a module of this package registers what it defines."""
