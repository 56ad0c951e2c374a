"""What a training run will take, before it is started: time, memory, and how sure that is. No model is loaded.

A step's floor is counted from the shape of the model (:mod:`.cost`), the data (:mod:`.lengths`) and what a card or a
CPU reaches (:mod:`.hardware`); how much longer real steps take comes from the stored rows of measured ones
(:mod:`.rows`, :mod:`.predict`), and :mod:`.check` holds every such row against its prediction. The formulas are in
``docs/planning.md``.
"""
