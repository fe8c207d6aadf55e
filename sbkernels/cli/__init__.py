"""The command line, `sbk`: a module for each command, loaded when it is run."""
