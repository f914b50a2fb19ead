import os
import sys

try:
    from fusedkv_ext.cli import main

    code = main()
    if "WORLD_SIZE" in os.environ:
        # FSDP's caches keep Gloo's threads past destroy_process_group, and one that lets go of a tensor while
        # the interpreter ends aborts the process (pytorch/pytorch#179291).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
except KeyboardInterrupt:  # while torch is being imported
    sys.exit(130)
