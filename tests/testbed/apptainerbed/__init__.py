"""A real Apptainer on a Debian 12-like machine, for tests that build images and run in them.

Debian 12 has no apptainer package, and its libc is too old for the one of Debian's development suite. So that
package is unpacked into a folder of its own, together with the newer libc and libraries that it needs, and
its programs are told to use those; the machine's own libc stays as it is.

``debs`` fetches packages, ``relocate`` writes the folder, ``foreign`` lets the kernel run programs of other
machines, ``cli`` is the command line. Only the standard library is used: the script runs before any
environment exists.
"""
