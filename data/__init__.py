"""Texts (toy, glue, tokenizer, batches) and files (command, checkpoint, peft_format, download)."""
