"""What a packed file's uncertainty is worth, on its own test data and on other inputs."""
