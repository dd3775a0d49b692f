"""Operations on rows that all layers share, in Triton where it runs, beside their plain twins."""
