"""Methods of fine-tuning compared on a model of your own: memory, time, FLOPs.

methods.py     what is compared: a name, how a model is prepared
loss.py        what a model is called with, and what a loss must be
gate.py        what a case must do, so that its figures are given
figures.py     bytes, bits, FLOPs, the predicted peak
memory.py      the highest memory of a process, and of a part of its time
run.py         one run of one method: the gate first, then the figures
processes.py   a process for each run, in rounds
display.py     what is shown meanwhile
machine.py     what figures depend on
report.py      the table, the plot, the JSON
benchmark.py   minipeft.benchmark, which puts these together
"""

from minipeft.measure.benchmark import benchmark
from minipeft.measure.memory import PeakMemory
from minipeft.measure.methods import METHODS, Method, Prepared, Unsupported
from minipeft.measure.report import Report

__all__ = ["METHODS", "Method", "PeakMemory", "Prepared", "Report", "Unsupported", "benchmark"]
