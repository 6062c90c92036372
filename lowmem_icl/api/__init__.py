"""What `import lowmem_icl` gives: the code that the commands call, for Python; nothing here prints."""
