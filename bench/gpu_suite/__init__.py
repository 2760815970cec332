"""What a short visit to a GPU should tell us, as steps in order of worth; run it by `python -m bench.gpu_suite`.

`steps.py` lists the steps, `runner.py` runs each in a process of its own, `step.py` is that process. `measure.py`
checks and times cases; the modules named in `steps.py` say which. `tables.py` makes the documentation's tables.
"""
