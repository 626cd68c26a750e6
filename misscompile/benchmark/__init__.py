"""The benchmark behind `misscompile bench`: the frozen base, misscompile and PEFT measured in turn in one process."""
