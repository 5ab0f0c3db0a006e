"""What every room may use: paths, files, messages, images, downloads, this machine.

Imports no room of this package, and no torch at import.
A new helper goes into the module of its idea; there are no re-exports here.
"""
