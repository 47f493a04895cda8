"""Edgespec: lossless speculative decoding that knows what a guess costs on this machine.

This package is the engine: pure logic over numpy arrays and Protocols. It knows no model runtime, no
files and no terminal; those live in `edgespec.models`, `edgespec.quant` and `edgespec.app`.
"""

__version__ = "0.1.0"
