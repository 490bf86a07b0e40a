"""One file per family of data sets. Importing a module of this package registers what it defines."""
