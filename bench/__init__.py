"""Benchmarks of the operations and of the model. Programs are at the top, their parts in folders.

`python -m bench`           times every operation and the model
bench.compare               compares a new measurement with the committed one
bench.ablations             measures what each feature of the model costs
bench.end_to_end            measures training, decoding and first-token speed
bench.profile               traces training steps or one operation
bench.tutorial              measures the steps of kernels/tutorial
bench.tune                  measures block sizes and implementations, for kernels/tuned
bench.tune_block_sizes      times Hopper's grouped kernels at every block width
bench.aot, bench.gpu        compile for other hardware; check and measure everything on a GPU

operations/         cases, candidates, timers, accuracy, roofline; `bench_*.py` are the entries of pytest
report/             results as JSON files, the terminal table, plots, the HTML page
model/              training steps to time
judge/              tells which features of a kernel are right, without its device
verification/       the error bound, the race detector, where an array is wrong; the tests use them too
numpy_interpreter/  runs programs and TPU kernels in NumPy
"""
