"""Other programs that run the model or spread the work: vLLM, and Ray. Each is optional.

A module imports its engine when it is used, never on import. What vLLM computes goes through
``capture.traces`` into a run file, as the traces of other programs do; Ray's actors record parts
as ``capture.recorder`` does.
"""
