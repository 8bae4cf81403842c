"""Tasks on text for transformers: classification, extractive question answering, sentence embedding."""
