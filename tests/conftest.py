"""What holds for every test."""

import signal

# A shell starts what runs in the background with Ctrl-C ignored, and so would everything be that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
