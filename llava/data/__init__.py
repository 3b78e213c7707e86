"""Training data: records on disk, labels, batches, samplers and the check that runs before a launch."""

FORK_SERVER_MODULES = ["__main__", "llava.data.fork_server"]
"""What Python's fork server imports once for all workers: the program, and what is read with. For
``multiprocessing.set_forkserver_preload``, before the first worker is started."""
