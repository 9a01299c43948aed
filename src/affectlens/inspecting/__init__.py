"""Steered and monitored models inside Inspect, the evaluation framework of the UK AI Security Institute (``inspect-ai``).

    inspect eval TASK --model affectlens/smollm2-135m -M vectors=runs/a/vectors -M steer=desperate:0.05 -M read=desperate,calm

registry    what Inspect finds by the entry point: the provider, the scorer, the tasks
arguments   what ``-M`` may say
instrument  the steering and the readings that they ask for
asking      a conversation and a configuration of Inspect as a request
provider    the model: requests of all samples batched, readings in the log
scoring     readings as scores, with intervals
playing     any experiment of affectlens as a task

Only this package imports ``inspect_ai`` (``pip install 'affectlens[inspect]'``). Of Inspect's private modules it uses four things
that have no public name; they are in :mod:`affectlens.inspecting.asking` and pinned by the tests.
"""
