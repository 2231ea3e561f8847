"""The tests that depend on the kernel, on kernels of Debian's suites, in an emulator: ``make test-kernels``.

No KVM is needed. The root file system is Debian 12's, with the kernel packages of the suites unpacked into it
(:mod:`tests.kernels.root`). Each kernel boots with :mod:`tests.kernels.guest` as its only program, which writes what it
finds to a second serial port. The page has a table of features and tests by kernel (:mod:`tests.kernels.report`).
"""
