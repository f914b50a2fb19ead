import sys

try:
    from fusedkv_ext.cli import main

    sys.exit(main())
except KeyboardInterrupt:  # while torch is being imported
    sys.exit(130)
