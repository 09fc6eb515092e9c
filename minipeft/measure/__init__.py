"""Methods of fine-tuning compared on a model of your own: memory, time, FLOPs.

methods.py     what is compared: a name, how a model is prepared
run.py         one run of one method: the gate first, then the figures
processes.py   a process for each run, in rounds
report.py      the table, the plot, the JSON
benchmark.py   minipeft.benchmark, which puts these together
"""

from minipeft.measure.benchmark import benchmark
from minipeft.measure.memory import PeakMemory
from minipeft.measure.methods import METHODS, Method, Prepared
from minipeft.measure.report import Report

__all__ = ["METHODS", "Method", "PeakMemory", "Prepared", "Report", "benchmark"]
