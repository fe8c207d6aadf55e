"""The command line: `sbk info | explain | compare | verify | softplus`."""
