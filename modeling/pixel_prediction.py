"""Which cells of a picture must be encoded: those whose pixels are not foretold by a neighbour's.

A cell is the block of pixels that becomes one visual token. Nothing but pixels decides, so how many stay depends on
the picture: few of a drawing, nearly all of a photograph.
"""

import torch


def cells_to_encode(cells: torch.Tensor, tolerance: float = 0.0) -> torch.Tensor:
    """Return which cells must be encoded, by the rule of PixelPrune (arXiv 2604.00886).

    cells      (F, rows, columns, P)  the pixels of each cell of F pictures of one size
    tolerance                         by how much a pixel may differ from what is foretold; 0 for not at all
    returns    (F, rows, columns)     True for those; the first of a picture always

    A cell is foretold from its neighbours somewhat as LOCO-I foretells a pixel (JPEG-LS). Where the cell up to the
    left is like the one to the left and unlike the one above, an edge runs down between them, and it should be as the
    one above; else as the one to the left. The first row has only a left, the first column only an above. What stands
    for a cell that is not encoded is a cell that is, so differences do not add up from cell to cell. The authors' code
    (github.com/OPPO-Mente-Lab/PixelPrune, pixelprune/methods/pred_2d.py, Apache-2.0) decides the same.
    """
    if tolerance > 0:
        return _beyond(cells, tolerance)
    as_left = torch.zeros(cells.shape[:3], dtype=torch.bool, device=cells.device)
    as_above = as_left.clone()
    as_left[:, :, 1:] = (cells[:, :, 1:] == cells[:, :, :-1]).all(-1)
    as_above[:, 1:] = (cells[:, 1:] == cells[:, :-1]).all(-1)
    edge_down = torch.ones_like(as_left)  # in the first column
    edge_down[:, 0] = False
    edge_down[:, 1:, 1:] = as_above[:, 1:, :-1] & ~as_left[:, :-1, 1:]
    return ~torch.where(edge_down, as_above, as_left)


def _beyond(cells: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Go along the diagonals, whose cells do not depend on each other: what stands for each is a cell that stays."""
    rows, columns = cells.shape[1:3]
    pixels = cells.flatten(1, 2)
    stands = torch.arange(rows * columns, device=cells.device).expand(len(cells), -1).clone()
    picture = torch.arange(len(cells), device=cells.device)[:, None]

    def alike(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        difference = pixels[picture, one].float() - pixels[picture, other].float()
        return difference.abs().amax(-1) <= tolerance

    for diagonal in range(1, rows + columns - 1):
        row = torch.arange(max(0, diagonal - columns + 1), min(diagonal, rows - 1) + 1, device=cells.device)
        here = row * columns + diagonal - row
        has_left, has_above = row < diagonal, row > 0
        left = torch.where(has_left, here - 1, here - columns)
        above = torch.where(has_above, here - columns, here - 1)
        corner = torch.where(has_left & has_above, here - columns - 1, left)
        left, above, corner = (stands[:, cell] for cell in (left, above, corner))
        foretold = torch.where(alike(corner, left) & ~alike(corner, above), above, left)
        here = here.expand(len(cells), -1)
        stands.scatter_(1, here, torch.where(alike(here, foretold), foretold, here))
    return (stands == torch.arange(rows * columns, device=cells.device)).view(cells.shape[:3])
