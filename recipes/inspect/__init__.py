"""What planning reads of the model, the data, the code and the disk: the only effects before compiling."""
