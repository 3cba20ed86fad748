"""N-gram language models: counted, smoothed, pruned, read and written; they answer through `recurlm.protocol` as neural ones do."""
