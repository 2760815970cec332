import sys

from revit_fast.cli import main

sys.exit(main())
