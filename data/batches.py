"""A split as padded token ids, and its batches."""

import numpy as np
import torch
from tqdm import tqdm


class Encoded:
    """A split's token ids and labels, on the device from the start; batches are cut there."""

    def __init__(self, split, tok, max_len, device):
        encoded = [tok.encode(*text, max_len=max_len)
                   for text in tqdm(split.texts, "tokenizing", leave=False, delay=2, disable=None)]
        self.lengths = np.array([len(input_ids) for input_ids, _ in encoded])
        # A batch is cut at its largest width. On CUDA widths are rounded up to multiples of 8, so
        # that there are few different ones.
        multiple = 8 if device.type == "cuda" else 1
        self.widths = np.minimum(-(-self.lengths // multiple) * multiple, max_len)
        shape = len(encoded), self.widths.max()
        mask = np.arange(shape[1]) < self.lengths[:, None]
        input_ids, token_type_ids = np.full(shape, tok.pad_id), np.zeros(shape, np.int64)
        input_ids[mask] = np.concatenate([input_ids for input_ids, _ in encoded])
        token_type_ids[mask] = np.concatenate([types for _, types in encoded])
        self.input_ids = torch.from_numpy(input_ids).to(device)
        self.token_type_ids = torch.from_numpy(token_type_ids).to(device)
        self.mask = torch.from_numpy(mask).to(device)
        self.labels = torch.tensor(split.labels, device=device)

    def batch(self, rows, width, padded):
        """((input_ids, token_type_ids, attention_mask), labels) of the rows numbered in `rows`.

        Inputs are (rows, width). The mask is None if no row is padded: attention is faster without.
        """
        mask = self.mask[rows, :width] if padded else None
        inputs = self.input_ids[rows, :width], self.token_type_ids[rows, :width], mask
        return inputs, self.labels[rows]

    def batches(self, row_lists):
        """[(rows, width, padded)], arguments of `batch`, for each array of row numbers.

        width and padded tell batches of different shape apart: each shape is a CUDA graph.
        """
        # One copy to the device, then split.
        all_rows = torch.from_numpy(np.concatenate(row_lists)).to(self.labels.device)
        result = []
        for numbers, rows in zip(row_lists, all_rows.split([len(x) for x in row_lists])):
            width = int(self.widths[numbers].max())
            padded = bool((self.lengths[numbers] < width).any())
            result.append((rows, width, padded))
        return result


def shuffled(widths, size, seed):
    """Arrays of row numbers: every row once, with rows of about its width, in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(widths))
    batches = []
    # Sorted within pools of 50 batches only, so that each epoch's batches differ.
    for start in range(0, len(order), 50 * size):
        pool = order[start:start + 50 * size]
        pool = pool[np.argsort(widths[pool], kind="stable")]
        batches += np.split(pool, range(size, len(pool), size))
    return [batches[i] for i in rng.permutation(len(batches))]


def by_width(widths, size):
    """Arrays of row numbers: every row once, the shortest first."""
    order = np.argsort(widths, kind="stable")
    return np.split(order, range(size, len(order), size))
