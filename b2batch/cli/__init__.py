"""The command line: one verb a module, each parse → one library call → print. Heavy imports in handlers."""
