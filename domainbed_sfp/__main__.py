"""`python -m domainbed_sfp` is the command `domainbed-sfp`."""

from domainbed_sfp.cli.main import main

if __name__ == "__main__":
    main()
