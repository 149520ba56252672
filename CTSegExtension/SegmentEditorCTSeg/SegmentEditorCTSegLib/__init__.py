"""The effect's code; see SegmentEditorEffect."""
