"""Everything about text: a made-up language, GLUE, tokenizers, downloads."""
