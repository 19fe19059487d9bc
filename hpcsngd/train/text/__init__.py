"""Text: files, tokens, encoders and scores. Tokenizers, encoders and metrics are imported where needed."""
