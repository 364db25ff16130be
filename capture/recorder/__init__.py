"""One capture, from its options to a closed run file: observe, move to the host, write.

Imports ``model``, ``store`` and ``prompts``; only the command line and the demo import it.
"""
