import sys

from fusedkv_ext.cli import main

sys.exit(main())
