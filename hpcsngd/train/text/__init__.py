"""Text: vocabularies, sentence pairs, streams of tokens, their tasks, and beam search."""
