"""Published rules for prose of the web, by set: the names of the rules and their thresholds.

A rule whose name holds `min_` drops what measures less than its threshold, one with `max_` what
measures more; `stages/data/heuristics.py` says what each measures. The order is that of cost.
"""

HEURISTICS: dict[str, dict[str, float]] = {
    # Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training
    # Gopher" (arXiv 2112.11446), A.1.1, "Quality filtering".
    "gopher-quality": {
        "gopher_min_words": 50,
        "gopher_max_words": 100_000,
        "gopher_min_mean_word_chars": 3,
        "gopher_max_mean_word_chars": 10,
        "gopher_max_hashes_per_word": 0.1,
        "gopher_max_ellipses_per_word": 0.1,
        "gopher_max_bullet_lines": 0.9,
        "gopher_max_ellipsis_lines": 0.3,
        "gopher_min_letter_words": 0.8,
        "gopher_min_stop_words": 2,
    },
    # Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    # Transformer" (JMLR 21:140), 2.2, as far as it judges whole documents; 5 sentences and words of
    # 1000 characters are from the code that made the corpus. Where that takes out single lines
    # (notices about scripts, cookies and terms), the share for which a document goes is ours. Lines
    # without terminal punctuation are for fineweb's rule; the list of bad words is left out.
    "c4": {
        "c4_max_curly_brackets": 0,
        "c4_max_lorem_ipsum": 0,
        "c4_max_word_chars": 1000,
        "c4_min_sentences": 5,
        "c4_max_notice_lines": 0.1,
    },
    # Penedo et al. 2024, "The FineWeb Datasets" (arXiv 2406.17557), 3.5. The last one, which the
    # paper does not name, is from datatrove, which made the corpus; that asks for no more than 0.01
    # of duplicate lines, where the paper says 0.1.
    "fineweb": {
        "fineweb_min_terminal_lines": 0.12,
        "fineweb_max_short_lines": 0.67,
        "fineweb_max_duplicate_line_chars": 0.1,
        "fineweb_max_line_breaks_per_word": 0.3,
    },
    # Rae et al. 2021, table A1.
    "gopher-repetition": {
        "gopher_max_duplicate_lines": 0.3,
        "gopher_max_duplicate_paragraphs": 0.3,
        "gopher_max_duplicate_line_chars": 0.2,
        "gopher_max_duplicate_paragraph_chars": 0.2,
        "gopher_max_top_2gram_chars": 0.2,
        "gopher_max_top_3gram_chars": 0.18,
        "gopher_max_top_4gram_chars": 0.16,
        "gopher_max_duplicate_5gram_chars": 0.15,
        "gopher_max_duplicate_6gram_chars": 0.14,
        "gopher_max_duplicate_7gram_chars": 0.13,
        "gopher_max_duplicate_8gram_chars": 0.12,
        "gopher_max_duplicate_9gram_chars": 0.11,
        "gopher_max_duplicate_10gram_chars": 0.1,
    },
}
