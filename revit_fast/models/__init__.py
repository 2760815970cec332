"""The model: its classes, others' weights, and folders that hold a saved one."""
