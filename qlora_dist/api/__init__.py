"""The Python API, for notebooks and scripts: what the commands do, as functions with small results.

configs    a YAML file, a dict or a RunConfig, with overrides -> RunConfig
planning   plan -> Plan (memory/planned)
data       build_data -> BuiltData: rows, documents, what is learned of them
training   train -> Run
runs       Run: metrics, summary and page of a run directory; compare: several in one page
trained    load_trained -> TrainedModel: generate, loss, model
unchanged  what a call leaves as it was

`qlora_dist/__init__.py` offers these names and imports each module when it is asked for. What is computed, and what is
refused with which words, is that of the commands: nothing is done twice here.
"""
