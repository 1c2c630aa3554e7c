"""Feeds mutated files to what reads them: `python -m benchmarks.fuzz video --seconds 600`.

The files that people hand over, and those of an output: job specs, banks, motions, videos, model configurations,
manifest records, the digest of a manifest, the hashes of inputs and of model files, `run.json`, leases and attempts.
Each input is a sound file with a few changes: bits, bytes, pieces cut out, doubled or taken from another file, and
values of its structure put in the place of others. An input that leads to a message not heard before is mutated
further, so that the search goes on where something happened.

Reading may succeed or raise the documented error, which names the file. The first input that does anything else ends
the search and is saved: another exception, a process that dies, 20 seconds of processor time, a gigabyte of memory. The
work is done in a child process, and input N of a seed is the same as long as the sound files are.
"""
