"""Tests of loadtest/: a stub service of known behaviour, in virtual time where exactness matters and once in real time."""
