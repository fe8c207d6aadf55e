"""`python -m sbkernels`: the same as `sbk`."""

from .cli.main import main

raise SystemExit(main())
