"""Measure what each step of the tutorials gains (`python -m bench.tutorial`).

A tutorial of `kernels/tutorial` has a module here with its name, and this interface:

    README, MARKS                       the file that its table is part of, and the marks around the table
    measure(budget, compiler)           the JSON document: a head, and "rows", one per step and baseline
    table(document)                     the document as a Markdown table
    wrong(document)                     names of the rows whose error is above the bound

`common.py` has what several need. Adding a tutorial: its package, its module, its name in
`dantinox.kernels.tutorial.TUTORIALS`.
"""
