"""Shelves, each one format or one text.

Texts: toy, glue, pieces, tokenizer, batches. Files: pretrained, peft_format, checkpoint, download,
picture, command.
"""
