"""`plainconv train` as a module, which is what torchrun starts: torchrun --nproc-per-node 2 -m plainconv.train ..."""

import sys

from plainconv.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
