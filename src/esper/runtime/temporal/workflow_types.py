"""The names of the workflow types. They stand in every history, so none of them can ever change."""

TRAINING_RUN = "TrainingRun"
TAMIYO_DECISION = "TamiyoDecision"
TEZZERET_COMPILE = "TezzeretCompile"
