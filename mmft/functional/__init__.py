"""Pure torch functions, one equation family a file. Each docstring: equation id, symbols, shapes, source."""
