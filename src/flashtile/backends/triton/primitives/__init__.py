"""The pieces that the kernels share; each mirrors a definition of ``flashtile.spec`` and is tested against it."""
