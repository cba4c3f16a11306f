"""Imported by the fork server, last of all: whoever else starts processes there has Ctrl-C reach them, as ever."""

import signal

from rlfeed.processes import ignore_interrupts

ignore_interrupts()  # what came until now is forgotten: the server itself ignores it from here on
signal.signal(signal.SIGINT, signal.default_int_handler)
