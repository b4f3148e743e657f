"""Supporting modules, each for one format or one kind of text.

Texts: toy, glue, pieces, tokenizer, batches. Files: pretrained, peft_format, checkpoint, download,
picture, command.
"""
