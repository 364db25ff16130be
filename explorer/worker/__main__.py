"""``python -m explorer.worker``: started by the app, which talks to it over its pipes."""

from explorer.worker.process import serve

if __name__ == "__main__":
    serve()
