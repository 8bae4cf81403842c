"""The front door: a recipe of what was typed, where none was written."""
