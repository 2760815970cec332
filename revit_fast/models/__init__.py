"""The model: its classes, weights from other libraries, and folders that hold a saved model."""
